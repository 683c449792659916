"""Tensors: backbone, adapter, encoder, head and the retriever made of them."""
