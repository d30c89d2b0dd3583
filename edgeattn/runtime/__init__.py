"""What an application embeds: verified bundles and sessions that run them."""
