"""A small real guest that writes provable records, its checker, and the demonstration built upon them."""
