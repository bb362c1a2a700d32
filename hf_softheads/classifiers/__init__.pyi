# Written by `make docs`.
from hf_softheads.classifiers.softpool import SoftPool as SoftPool
