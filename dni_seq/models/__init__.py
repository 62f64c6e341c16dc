"""Reference networks: a language model, a vector RNN, feed-forward classifiers, and networks in several parts."""
