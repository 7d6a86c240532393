"""The control plane of model servers: who is there, what models take, how busy they are, and changing that. Never timed."""
