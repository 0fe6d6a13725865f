{{- define "kvstore.head.process" -}}
command:
  - ray
  - start
  - --head
  - --port=6379
  - --node-name=$(POD_NAME)
  - --node-ip-address=$(POD_IP)
  - --num-cpus=0
  - --num-gpus=0
  - --object-store-memory=83886080
  - --include-dashboard=false
  - --disable-usage-stats
  {{- if include "kvstore.head.redisPassword" . }}
  # Ray 2.60 reads the password from no variable.
  - --redis-password=$(RAY_REDIS_PASSWORD)
  {{- end }}
  - --block
ports:
  - {name: gcs, containerPort: 6379}
startupProbe: {tcpSocket: {port: gcs}, periodSeconds: 5, failureThreshold: 60}
readinessProbe: {tcpSocket: {port: gcs}, periodSeconds: 5, failureThreshold: 3}
livenessProbe: {tcpSocket: {port: gcs}, periodSeconds: 10, failureThreshold: 6}
resources:
  {{- toYaml .Values.head.resources | nindent 2 }}
{{- end -}}

{{/* Whether Ray's state is in Redis, so that storage nodes outlive a restart of the head. */}}
{{- define "kvstore.head.usesRedis" -}}
{{- if and (ne .Values.redis.mode "none") (not .Values.kuberay.rocksdb.enabled) }}true{{ end -}}
{{- end -}}

{{- define "kvstore.head.redisPassword" -}}
{{- if include "kvstore.head.usesRedis" . }}{{ include "kvstore.redisPasswordKey" . }}{{ end -}}
{{- end -}}

{{/* Under KubeRay the operator sets the address and the namespace, and refuses a RayCluster that does so itself. */}}
{{- define "kvstore.head.environment" -}}
{{- with include "kvstore.head.redisPassword" . }}
- {name: RAY_REDIS_PASSWORD, valueFrom: {secretKeyRef: {name: {{ include "kvstore.redisSecret" $ }}, key: {{ . }}}}}
{{- end }}
{{- if and (include "kvstore.head.usesRedis" .) (eq .Values.mode "statefulset") }}
- {name: RAY_REDIS_ADDRESS, value: {{ include "kvstore.redisAddress" . | quote }}}
- {name: RAY_external_storage_namespace, value: {{ .Release.Namespace }}-{{ include "kvstore.fullname" . }}}
{{- end }}
{{- end -}}

{{- define "kvstore.head.volume" -}}
- {name: storage, emptyDir: {}}
{{- end -}}
