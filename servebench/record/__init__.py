"""What a run measured: per-query columns, their histograms, and the directory that keeps them."""
