"""Runs the pods of the Helm chart as processes of this machine, where there is no Kubernetes.

Commands, arguments, environment, files, probes and hooks are those of the rendered manifests. A pod has an address of
the loopback network of its own. Three things differ: paths at which a container mounts volumes, and host names of
Services, are replaced by folders and addresses wherever they occur in text; all pods share these folders, but for
/tmp (their files are the same, and storage nodes have a folder each); and processes have the user, the limits and the
root of whoever runs them.
"""
