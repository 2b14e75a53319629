"""The link process: the MQTT session and what waits for it. It has the network and decides nothing."""
