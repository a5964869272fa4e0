"""HF PEFT folders, read and written: `read_peft`, `export_peft` and the exact conversions between the two layouts."""
