"""Real images read from shards in an order that does not depend on who reads them."""
