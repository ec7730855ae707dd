"""Stores: a folder or a bucket that holds a cache, and copies of it. `open_store` picks the one for a location."""

from pathlib import Path

from residual_saes.shared.stores.folder import Folder
from residual_saes.shared.stores.location import Bucket, Location, folder_name, parse_folder, parse_location, parse_name
from residual_saes.shared.stores.protocol import Staged, Store, get_or_none, local_path

__all__ = [
    "Bucket", "Folder", "Location", "Staged", "Store", "folder_name", "get_or_none", "local_path", "open_store", "parse_folder",
    "parse_location", "parse_name",
]  # fmt: skip


def open_store(location: Location) -> Store:
    """The store at a location. Raises UserError for a bucket where the package that it needs is not installed."""
    if isinstance(location, Path):
        return Folder(location)
    from residual_saes.shared.stores.s3 import S3  # here, because its package is an extra

    return S3(location)
