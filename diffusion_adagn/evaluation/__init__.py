"""What a model is worth: measurements that need labelled pictures."""
