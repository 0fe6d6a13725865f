{{/* Names, labels and the addresses that follow from them. */}}

{{- define "kvstore.name" -}}
{{- default .Chart.Name .Values.nameOverride -}}
{{- end -}}

{{- define "kvstore.fullname" -}}
{{- $name := include "kvstore.name" . -}}
{{- $joined := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- default $joined .Values.fullnameOverride -}}
{{- end -}}

{{/* Labels that select every pod of the release. */}}
{{- define "kvstore.selector" -}}
app.kubernetes.io/name: {{ include "kvstore.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Labels that select the pods of one component. Takes root and component. */}}
{{- define "kvstore.componentSelector" -}}
{{ include "kvstore.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Metadata of an object. Takes root and component, and if there are any: name or suffix of the name, annotations, labels. */}}
{{- define "kvstore.metadata" -}}
name: {{ .name | default (printf "%s%s" (include "kvstore.fullname" .root) (.suffix | default "")) }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "kvstore.componentSelector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
  {{- with merge (dict) (.labels | default dict) .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "kvstore.gateway" -}}
{{ include "kvstore.fullname" . }}.{{ .Release.Namespace }}.svc
{{- end -}}

{{- define "kvstore.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "kvstore.fullname" .) "default") -}}
{{- end -}}

{{- define "kvstore.authSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-auth" (include "kvstore.fullname" .)) -}}
{{- end -}}

{{- define "kvstore.raySecret" -}}
{{- .Values.ray.existingSecret | default (printf "%s-ray" (include "kvstore.fullname" .)) -}}
{{- end -}}

{{- define "kvstore.redisSecret" -}}
{{- .Values.redis.external.existingSecret | default (printf "%s-redis" (include "kvstore.fullname" .)) -}}
{{- end -}}

{{- define "kvstore.redisAddress" -}}
{{- .Values.redis.external.address | default (printf "%s-redis:6379" (include "kvstore.fullname" .)) -}}
{{- end -}}

{{/* Key of Redis' password in its Secret; empty when Redis has none. */}}
{{- define "kvstore.redisPasswordKey" -}}
{{- eq .Values.redis.mode "external" | ternary .Values.redis.external.passwordKey "password" -}}
{{- end -}}

{{- define "kvstore.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "kvstore.fullname" .)) -}}
{{- end -}}

{{- define "kvstore.tlsName" -}}
{{- .Values.tls.name | default (include "kvstore.gateway" .) -}}
{{- end -}}

{{/* Host names that the certificate is made for. */}}
{{- define "kvstore.tlsHosts" -}}
{{- $fullname := include "kvstore.fullname" . -}}
{{- $hosts := list (include "kvstore.tlsName" .) "localhost" -}}
{{- range list $fullname (printf "%s-gateway" $fullname) -}}
{{- $service := printf "%s.%s" . $.Release.Namespace -}}
{{- $hosts = concat $hosts (list . $service (printf "%s.svc" $service) (printf "%s.svc.%s" $service $.Values.clusterDomain)) -}}
{{- end -}}
{{- uniq $hosts | toJson -}}
{{- end -}}
