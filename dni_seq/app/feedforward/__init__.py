"""Commands that train feed-forward networks on digits."""
