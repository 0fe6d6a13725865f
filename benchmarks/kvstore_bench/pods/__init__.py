"""Runs the pods of the Helm chart as processes of this machine, where there is no Kubernetes.

Commands, arguments, environment, files, probes and hooks are those of the rendered manifests. A pod has an address of
the loopback network of its own, and a folder of its own for each volume. Two things differ: paths at which a container
mounts volumes, and host names of Services, are replaced by the folders and addresses wherever they occur in text; and
processes have the user, the limits and the root of whoever runs them.
"""
