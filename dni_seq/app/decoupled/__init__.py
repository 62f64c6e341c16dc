"""Commands that train a network in two processes, or at two time scales."""
