"""Hessians and Gauss-Newton matrices of PyTorch models."""
