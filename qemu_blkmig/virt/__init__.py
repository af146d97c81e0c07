"""Guests that libvirt manages: its connections, its storage, and the gate in its migration stream."""
