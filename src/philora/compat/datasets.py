"""List the private names of datasets that dataset/datasets_library.py uses."""

from __future__ import annotations

from philora.compat.private_names import PrivateName

PRIVATE = (
    PrivateName(
        "datasets.arrow_dataset.Dataset._fingerprint",
        "the cache's key of a dataset that is given in Python",
        "the digest of its content would read all of it",
    ),
)
