"""Regressions as scikit-learn estimators. This package needs scikit-learn."""

try:
    from sklearn.utils.validation import validate_data  # noqa: F401 (came with 1.6)
except ImportError as error:
    raise ImportError(
        "lowrank_inverse.sklearn needs scikit-learn 1.6 or newer: "
        'pip install "lowrank-inverse[sklearn]".'
    ) from error

from lowrank_inverse.sklearn.gaussian_process import GaussianProcessRegressor
from lowrank_inverse.sklearn.group_ridge.classification import GroupLogisticRegressionCV
from lowrank_inverse.sklearn.group_ridge.regression import GroupRidgeCV
from lowrank_inverse.sklearn.kernel_ridge import KernelRidge
from lowrank_inverse.sklearn.kernel_ridge_cv import KernelRidgeCV
from lowrank_inverse.sklearn.nystrom_ridge import NystromRidge

__all__ = [
    "GaussianProcessRegressor",
    "GroupLogisticRegressionCV",
    "GroupRidgeCV",
    "KernelRidge",
    "KernelRidgeCV",
    "NystromRidge",
]
