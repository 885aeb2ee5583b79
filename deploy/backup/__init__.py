"""Backups of an embedded mesh's data folder, taken while it runs, and folders made from them.

FOLDER/manifest.json    written last: what is here, with its SHA-256
FOLDER/bus.jsonl        messages that only the broker had
FOLDER/data/...         what becomes the data folder
"""
