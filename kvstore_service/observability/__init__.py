"""What an operator sees of a cluster: metrics, a dashboard and alerts, logs, a status page and reports."""
