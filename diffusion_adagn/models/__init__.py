"""The network: embeddings, conditioning kinds, blocks, AdaGNUNet."""
