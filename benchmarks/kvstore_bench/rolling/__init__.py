"""What clients notice while every pod of the chart is restarted, and while the cluster grows and shrinks."""
