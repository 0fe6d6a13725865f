{{/* What the pods of the release have in common. These templates take root, component, and pod: the component's values. */}}

{{- define "kvstore.podMetadata" -}}
labels:
  {{- include "kvstore.componentSelector" . | nindent 2 }}
  {{- with merge (dict) .pod.podLabels .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .pod.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Everything of a pod's spec but containers and volumes. */}}
{{- define "kvstore.podSpec" -}}
serviceAccountName: {{ include "kvstore.serviceAccount" .root }}
automountServiceAccountToken: false
# Kubernetes would set KVSTORE_PORT=tcp://... and the like.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity | default (include "kvstore.antiAffinity" . | fromYaml) }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml . | nindent 4 | trim }}
    {{- if not .labelSelector }}
    labelSelector:
      matchLabels:
        {{- include "kvstore.componentSelector" $ | nindent 8 }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Copies of a chunk are on different nodes, so two nodes on one machine halve what a copy is worth. */}}
{{- define "kvstore.antiAffinity" -}}
{{- $kind := .pod.antiAffinity | default "none" -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (include "kvstore.componentSelector" . | fromYaml)) -}}
{{- if eq $kind "soft" }}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        {{- toYaml $term | nindent 8 }}
{{- else if eq $kind "hard" }}
podAntiAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    - {{ toYaml $term | nindent 6 | trim }}
{{- end }}
{{- end -}}

{{- define "kvstore.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* Image of the service. Takes the root. */}}
{{- define "kvstore.image" -}}
{{- with .Values.image -}}
image: {{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
imagePullPolicy: {{ .pullPolicy }}
{{- end -}}
{{- end -}}

{{/* How the CLI in a pod reaches the gateway. Takes the root. */}}
{{- define "kvstore.tlsEnvironment" -}}
{{- if ne .Values.tls.source "disabled" }}
- {name: KVSTORE_TLS_CA, value: /etc/kvstore/tls/ca.crt}
- {name: KVSTORE_TLS_NAME, value: {{ include "kvstore.tlsName" . }}}
{{- if .Values.tls.requireClientCertificate }}
- {name: KVSTORE_TLS_CERT, value: /etc/kvstore/tls/tls.crt}
- {name: KVSTORE_TLS_KEY, value: /etc/kvstore/tls/tls.key}
{{- end }}
{{- end }}
{{- end -}}

{{/* How a port answers a probe. Kubernetes' own gRPC probes cannot speak TLS. Takes root and port. */}}
{{- define "kvstore.probe" -}}
{{- if eq .root.Values.tls.source "disabled" -}}
grpc: {port: {{ .port }}, service: ""}
{{- else -}}
exec: {command: [/bin/sh, -c, 'exec kvstore probe "$POD_IP:{{ .port }}"']}
{{- end -}}
{{- end -}}
