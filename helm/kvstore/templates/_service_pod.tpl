{{/* Pod template of head, storage nodes and gateway, the same under StatefulSets and KubeRay. Takes root and component.
What differs is in _head.tpl, _storage.tpl and _gateway.tpl: `process`, `environment` and `volume` of the component. */}}
{{- define "kvstore.podTemplate" -}}
{{- $context := merge (dict "pod" (index .root.Values .component)) . -}}
metadata:
  {{- include "kvstore.podMetadata" $context | nindent 2 }}
spec:
  {{- include "kvstore.podSpec" $context | nindent 2 }}
  {{- with .graceSeconds }}
  terminationGracePeriodSeconds: {{ . }}
  {{- end }}
  containers:
    - name: {{ .component }}
      {{- include "kvstore.image" .root | nindent 6 }}
      {{- include "kvstore.containerSecurity" . | nindent 6 }}
      {{- include (printf "kvstore.%s.process" .component) .root | nindent 6 }}
      env:
        {{- include "kvstore.environment" .root | nindent 8 }}
        {{- with include (printf "kvstore.%s.environment" .component) .root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- with .root.Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .root.Values.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: storage, mountPath: /var/lib/kvstore}
        {{- with include "kvstore.secretMounts" .root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- if eq .component "gateway" }}
        - {name: serve, mountPath: /etc/kvstore/serve, readOnly: true}
        {{- end }}
        {{- with .root.Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: shm, emptyDir: {medium: Memory, sizeLimit: 256Mi}}
    {{- with include (printf "kvstore.%s.volume" .component) .root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with include "kvstore.secretVolumes" .root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with .root.Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "kvstore.environment" -}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: HOME, value: /tmp}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_AUTH_TOKEN, valueFrom: {secretKeyRef: {name: {{ include "kvstore.raySecret" . }}, key: auth_token}}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
# The container's limit ends what takes too much memory; Ray would kill storage nodes before.
- {name: RAY_memory_monitor_refresh_ms, value: "0"}
# So long storage nodes and the gateway wait for a head that restarts.
- {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: "300"}
- {name: KVSTORE_ADDRESS, value: "{{ include "kvstore.fullname" . }}:7420"}
{{- if .Values.auth.enabled }}
- {name: KVSTORE_TOKEN_FILE, value: /etc/kvstore/node/token}
{{- end }}
{{- include "kvstore.tlsEnvironment" . }}
{{- end -}}

{{/* Storage nodes are started by the gateway, and find these files at the same paths as it. */}}
{{- define "kvstore.secretMounts" -}}
{{- if ne .Values.tls.source "disabled" }}
- {name: tls, mountPath: /etc/kvstore/tls, readOnly: true}
{{- end }}
{{- if .Values.auth.enabled }}
- {name: credentials, mountPath: /etc/kvstore/credentials, readOnly: true}
- {name: node, mountPath: /etc/kvstore/node, readOnly: true}
{{- end }}
{{- if .Values.encryption.existingSecret }}
- {name: encryption, mountPath: /etc/kvstore/encryption, readOnly: true}
{{- end }}
{{- end -}}

{{- define "kvstore.secretVolumes" -}}
{{- if ne .Values.tls.source "disabled" }}
- {name: tls, secret: {secretName: {{ include "kvstore.tlsSecret" . }}, defaultMode: 0440}}
{{- end }}
{{- if .Values.auth.enabled }}
- name: credentials
  secret: {secretName: {{ include "kvstore.authSecret" . }}, defaultMode: 0440, items: [{key: credentials.json, path: credentials.json}]}
- name: node
  secret: {secretName: {{ include "kvstore.authSecret" . }}, defaultMode: 0440, items: [{key: node-token, path: token}]}
{{- end }}
{{- with .Values.encryption.existingSecret }}
- {name: encryption, secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: keys, path: keys}]}}
{{- end }}
{{- end -}}
