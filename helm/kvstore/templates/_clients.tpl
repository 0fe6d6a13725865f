{{/* Settings of workers by their flat names, as `connect` and the connector of vLLM take them. */}}
{{- define "kvstore.clientSettings" -}}
address: {{ include "kvstore.gateway" . }}:7420
{{- if .Values.auth.enabled }}
token_file: {{ .Values.clients.mountPath }}/token
{{- end }}
{{- if ne .Values.tls.source "disabled" }}
tls_ca: {{ .Values.clients.mountPath }}/ca.crt
tls_name: {{ include "kvstore.tlsName" . }}
{{- end }}
{{- with .Values.clients.settings }}
{{ toYaml . }}
{{- end }}
{{- end -}}
