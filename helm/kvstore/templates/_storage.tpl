{{- define "kvstore.storage.process" -}}
command:
  - ray
  - start
  - --address={{ include "kvstore.fullname" . }}-head:6379
  - --node-name=$(POD_NAME)
  - --node-ip-address=$(POD_IP)
  - --num-cpus=1
  - --num-gpus=0
  - --object-store-memory=83886080
  - --disable-usage-stats
  - --block
ports:
  - {name: grpc, containerPort: 7421}
  - {name: bulk, containerPort: 7422}
{{- $probe := include "kvstore.probe" (dict "root" . "port" 7421) }}
# The gateway starts the node, and the node reads its disk: half an hour in all.
startupProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 180
readinessProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 3
# A busy node is worth waiting for: with it go the chunks in its memory.
livenessProbe:
  {{- $probe | nindent 2 }}
  periodSeconds: 30
  timeoutSeconds: 20
  failureThreshold: 20
{{- if .Values.storage.drain.enabled }}
lifecycle:
  preStop:
    exec:
      command:
        - /bin/sh
        - -c
        # An upgrade replaces the gateway at the same time; without one nothing can be drained.
        - |
          timeout 60 sh -c 'until kvstore probe "$KVSTORE_ADDRESS"; do sleep 2; done'
          timeout {{ int .Values.storage.drain.timeoutSeconds }} kvstore drain "$POD_NAME" --wait || true
{{- end }}
resources:
  {{- include "kvstore.storageResources" . | nindent 2 }}
{{- end -}}

{{- define "kvstore.storage.environment" -}}
# Ray would wait half a minute for the storage node to end by itself; the hook above has drained it.
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "0"}
{{- end -}}

{{/* A StatefulSet has a claim template for the disk; under KubeRay a claim lives as long as its pod. */}}
{{- define "kvstore.storage.volume" -}}
{{- if not .Values.storage.disk.enabled -}}
- {name: storage, emptyDir: {}}
{{- else if eq .Values.mode "kuberay" -}}
- name: storage
  ephemeral:
    volumeClaimTemplate:
      metadata:
        labels:
          {{- include "kvstore.componentSelector" (dict "root" . "component" "storage") | nindent 10 }}
      spec:
        {{- include "kvstore.claim" .Values.storage.disk.volume | nindent 8 }}
{{- end -}}
{{- end -}}

{{/* Spec of a claim. Takes the values of a volume. */}}
{{- define "kvstore.claim" -}}
accessModes:
  {{- toYaml .accessModes | nindent 2 }}
{{- with .storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources: {requests: {storage: {{ .size }}}}
{{- end -}}

{{- define "kvstore.storage.graceSeconds" -}}
{{- .Values.storage.drain.enabled | ternary (add 120 .Values.storage.drain.timeoutSeconds) 60 -}}
{{- end -}}
