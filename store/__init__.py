"""What is kept: rows in SQL, vectors in FAISS, and the map of an unmodified checkpoint's bytes. No torch."""
