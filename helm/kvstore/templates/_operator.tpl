{{/* Pod spec of commands of the operator: the drain before a scale-down, and the chart's test. It runs where the gateway
may run. Takes root, name and script. */}}
{{- define "kvstore.operatorPod" -}}
{{- include "kvstore.podSpec" (dict "root" .root "component" .name "pod" .root.Values.gateway) }}
restartPolicy: Never
containers:
  - name: {{ .name }}
    {{- include "kvstore.image" .root | nindent 4 }}
    {{- include "kvstore.containerSecurity" . | nindent 4 }}
    command: [/bin/sh, -euc]
    args:
      - |
        {{- .script | nindent 8 }}
    env:
      - {name: HOME, value: /tmp}
      - {name: KVSTORE_ADDRESS, value: "{{ include "kvstore.fullname" .root }}:7420"}
      {{- if .root.Values.auth.enabled }}
      - {name: KVSTORE_TOKEN_FILE, value: /etc/kvstore/tokens/admin-token}
      {{- end }}
      {{- with include "kvstore.tlsEnvironment" .root | trim }}
      {{- . | nindent 6 }}
      {{- end }}
    resources: {requests: {cpu: 100m, memory: 256Mi}, limits: {memory: 1Gi}}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- if ne .root.Values.tls.source "disabled" }}
      - {name: tls, mountPath: /etc/kvstore/tls, readOnly: true}
      {{- end }}
      {{- if .root.Values.auth.enabled }}
      - {name: tokens, mountPath: /etc/kvstore/tokens, readOnly: true}
      {{- end }}
volumes:
  - {name: tmp, emptyDir: {}}
  {{- if ne .root.Values.tls.source "disabled" }}
  - {name: tls, secret: {secretName: {{ include "kvstore.tlsSecret" .root }}, defaultMode: 0440}}
  {{- end }}
  {{- if .root.Values.auth.enabled }}
  - name: tokens
    secret:
      secretName: {{ include "kvstore.authSecret" .root }}
      defaultMode: 0440
      items: [{key: admin-token, path: admin-token}, {key: worker-token, path: worker-token}]
  {{- end }}
{{- end -}}
