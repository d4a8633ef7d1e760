"""What commands print: `live` while they run, `tables` when they are done."""
