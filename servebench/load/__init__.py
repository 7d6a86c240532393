"""When queries are due and which sample each carries: pure functions of a profile and its seeds, settled before t=0."""
