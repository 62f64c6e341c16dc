"""Several processes: how they meet, share lanes and gradients, or train in decoupled parts."""
