"""Training in several processes: process groups, data parallelism and decoupled parts."""
