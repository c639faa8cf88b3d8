"""Data sets, from the folder of `--data-dir` or from scikit-learn; nothing is downloaded."""
