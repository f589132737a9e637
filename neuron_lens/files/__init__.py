"""One kind of outside world: files, local and remote, and the checkpoints in them."""
