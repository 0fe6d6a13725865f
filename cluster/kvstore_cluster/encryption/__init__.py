"""Encryption at rest: the keys, AES-GCM with keys derived from them, and small encrypted files.

`disk/encrypted_layout` encrypts the records of a node's disk with it.
"""

from kvstore_cluster.encryption.files import FileCipher, key_name_of
from kvstore_cluster.encryption.keys import EncryptionKey, EncryptionKeys, KeySource, key_of, read_keys

__all__ = ["EncryptionKey", "EncryptionKeys", "FileCipher", "KeySource", "key_name_of", "key_of", "read_keys"]
