"""The model on a device: residency, bank, readers, routing, generation. No HTTP, no SQL."""
