"""What a model is worth: measurements that need labelled images."""
