"""libvirt's hook, and what reads and writes the same small files as it does.

`qemu.py` is the hook: one file that may be copied to where libvirt looks, so it imports nothing of ours; whatever else
needs the formats that it reads (ownership records, expected domains) imports them from there.
"""
