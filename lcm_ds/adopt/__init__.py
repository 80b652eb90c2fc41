"""Sources of documents whose sentences have been encoded already: parquet, Arrow and NumPy files → documents."""
