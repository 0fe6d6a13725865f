{{- define "kvstore.gateway.process" -}}
command: [kvstore, serve, --config, /etc/kvstore/serve/serve.yaml]
ports:
  - {name: grpc, containerPort: 7420}
  {{- if .Values.metrics.enabled }}
  - {name: metrics, containerPort: 9400}
  {{- end }}
  {{- if .Values.events.enabled }}
  - {name: events, containerPort: 7430}
  - {name: events-replay, containerPort: 7431}
  {{- end }}
{{- $probe := include "kvstore.probe" (dict "root" . "port" 7420) }}
startupProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 60
readinessProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 3
livenessProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: 20
  timeoutSeconds: 20
  failureThreshold: 6
resources:
  {{- toYaml .Values.gateway.resources | nindent 2 }}
{{- end -}}

{{- define "kvstore.gateway.environment" -}}
{{- if ne .Values.redis.mode "none" }}
- {name: KVSTORE_REDIS, valueFrom: {secretKeyRef: {name: {{ include "kvstore.redisSecret" . }}, key: url}}}
{{- end }}
{{- end -}}

{{- define "kvstore.gateway.volume" -}}
- name: serve
  configMap: {name: {{ include "kvstore.fullname" . }}-serve}
{{- if .Values.gateway.persistence.enabled }}
- name: storage
  persistentVolumeClaim: {claimName: {{ include "kvstore.fullname" . }}-gateway}
{{- else }}
- {name: storage, emptyDir: {}}
{{- end }}
{{- end -}}
