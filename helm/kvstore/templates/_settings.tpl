{{/* serve.yaml, the settings of `kvstore serve`. A change restarts the gateway, which restarts the storage nodes one after the
other if it concerns them. */}}
{{- define "kvstore.serveSettings" -}}
ray_address: {{ include "kvstore.fullname" . }}-head:6379
ray_join: true
keep_nodes: true
# All addresses, and so also that of `kubectl port-forward`.
listen: 0.0.0.0:7420
{{- if .Values.metrics.enabled }}
metrics_port: 9400
{{- end }}
{{- if .Values.events.enabled }}
events: 0.0.0.0:7430
{{- end }}
storage_port: 7421
memory: {{ .Values.storage.memory }}B
{{- if .Values.storage.disk.enabled }}
disk: {{ .Values.storage.disk.size }}B
{{- end }}
data_dir: /var/lib/kvstore
durability: {{ .Values.storage.disk.enabled | ternary .Values.chunks.durability "memory" }}
policy: {{ .Values.chunks.policy }}
replicas: {{ .Values.chunks.replicas }}
repair_bandwidth: {{ .Values.chunks.repairBandwidth }}B
insecure: {{ .Values.insecure }}
{{- if .Values.auth.enabled }}
credentials: /etc/kvstore/credentials/credentials.json
node_token_file: /etc/kvstore/node/token
{{- end }}
{{- if ne .Values.tls.source "disabled" }}
tls_cert: /etc/kvstore/tls/tls.crt
tls_key: /etc/kvstore/tls/tls.key
tls_ca: /etc/kvstore/tls/ca.crt
tls_name: {{ include "kvstore.tlsName" . }}
{{- if .Values.tls.requireClientCertificate }}
tls_client_ca: /etc/kvstore/tls/ca.crt
{{- end }}
{{- end }}
{{- if .Values.encryption.existingSecret }}
encryption_key_file: /etc/kvstore/encryption/keys
{{- end }}
{{- with .Values.tracing.otlpEndpoint }}
otlp_endpoint: {{ . }}
{{- end }}
log_format: {{ .Values.log.format }}
log_level: {{ .Values.log.level }}
metrics_tenants: {{ .Values.metrics.tenants }}
experiments: {{ .Values.experiments }}
{{- end -}}
