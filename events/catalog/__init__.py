"""The business events, commands and replies that are shipped: users, orders, payments, stock, shipping."""
