"""Networks that turn pictures into numbers, exactly as the papers did."""
