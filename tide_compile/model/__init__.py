"""A decoder and what can be known of it: layers, norm, head, fingerprint, where it is loaded from."""
