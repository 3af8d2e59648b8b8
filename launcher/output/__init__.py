"""What people and programs read: `terminal` prints tables, facts and JSON; `page` makes an HTML file."""
