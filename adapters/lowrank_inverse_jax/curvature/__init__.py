"""Hessians and Gauss-Newton matrices of functions on pytrees."""
