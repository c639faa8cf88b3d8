"""Hessians and Gauss-Newton matrices of live models."""
