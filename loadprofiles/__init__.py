"""The load profiles that ship with servebench; see `servebench.profile.bundled_profiles`."""
