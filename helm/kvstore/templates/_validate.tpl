{{/* JSON array of sentences about values that do not fit together. values.schema.json says what each value may be. */}}
{{- define "kvstore.problems" -}}
{{- $problems := list -}}
{{- $name := include "kvstore.fullname" . -}}
{{- if or (gt (len $name) 40) (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name)) -}}
{{- $problems = append $problems (printf "fullnameOverride: objects would be named %q; set it to at most 40 small letters, digits and -, beginning with a letter" $name) -}}
{{- end -}}
{{- $problems = concat $problems (include "kvstore.problems.security" . | fromJsonArray) -}}
{{- $problems = concat $problems (include "kvstore.problems.resources" . | fromJsonArray) -}}
{{- $problems = concat $problems (include "kvstore.problems.storage" . | fromJsonArray) -}}
{{- $problems = concat $problems (include "kvstore.problems.redis" . | fromJsonArray) -}}
{{- $problems = concat $problems (include "kvstore.problems.additions" . | fromJsonArray) -}}
{{- if and .Values.kuberay.rocksdb.enabled (ne .Values.mode "kuberay") -}}
{{- $problems = append $problems "kuberay.rocksdb.enabled: needs mode: kuberay, whose operator makes the volume; switch it off, or change the mode" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- $problems = append $problems "grpcRoute.parentRefs: name the Gateway that the route belongs to, or switch grpcRoute.enabled off" -}}
{{- end -}}
{{- range list "serviceMonitor" "prometheusRule" -}}
{{- if and (index $.Values.metrics .).enabled (not $.Values.metrics.enabled) -}}
{{- $problems = append $problems (printf "metrics.%s.enabled: needs metrics.enabled: true; there is nothing to scrape otherwise" .) -}}
{{- end -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "kvstore.problems.security" -}}
{{- $problems := list -}}
{{- $tls := .Values.tls -}}
{{- if not .Values.insecure -}}
{{- if eq $tls.source "disabled" -}}
{{- $problems = append $problems "insecure: tls.source is disabled, so tokens and chunks can be read on the network; set insecure: true if nobody else reaches it, or choose another tls.source" -}}
{{- end -}}
{{- if not .Values.auth.enabled -}}
{{- $problems = append $problems "insecure: auth.enabled is false, so everybody may read and change chunks; set insecure: true if nobody else reaches the pods, or switch auth.enabled on" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.auth.existingSecret .Values.auth.tokens -}}
{{- $problems = append $problems "auth.tokens: the tokens of auth.existingSecret are used; remove one of the two" -}}
{{- end -}}
{{- if and (not .Values.auth.enabled) (or .Values.auth.existingSecret .Values.auth.tokens) -}}
{{- $problems = append $problems "auth.enabled: is false, but auth.existingSecret or auth.tokens is given; switch it on, or remove them" -}}
{{- end -}}
{{- if ne (eq $tls.source "existingSecret") (not (empty $tls.existingSecret)) -}}
{{- $problems = append $problems (printf "tls.existingSecret: goes with tls.source: existingSecret, which is %s; set both or none" $tls.source) -}}
{{- end -}}
{{- if ne (eq $tls.source "certManager") (not (empty $tls.certManager.issuerRef)) -}}
{{- $problems = append $problems (printf "tls.certManager.issuerRef: goes with tls.source: certManager, which is %s; name the issuer, or leave it empty" $tls.source) -}}
{{- end -}}
{{- if and $tls.requireClientCertificate (has $tls.source (list "selfSigned" "disabled")) -}}
{{- $problems = append $problems (printf "tls.requireClientCertificate: with tls.source: %s no client could get a certificate; use certManager or existingSecret" $tls.source) -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "kvstore.problems.resources" -}}
{{- $problems := list -}}
{{- $components := dict "gateway" .Values.gateway.resources "head" .Values.head.resources "storage" (include "kvstore.storageResources" . | fromYaml) "redis.bundled" .Values.redis.bundled.resources -}}
{{- range $component, $resources := $components -}}
{{- range $resource, $request := $resources.requests | default dict -}}
{{- $limit := get ($resources.limits | default dict) $resource -}}
{{- if and $limit (gt (include "kvstore.thousandths" $request | int64) (include "kvstore.thousandths" $limit | int64)) -}}
{{- $problems = append $problems (printf "%s.resources.requests.%s: %v is more than the limit of %v; Kubernetes refuses that" $component $resource $request $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "kvstore.problems.storage" -}}
{{- $problems := list -}}
{{- $storage := .Values.storage -}}
{{- $disk := $storage.disk -}}
{{- if gt (int .Values.chunks.replicas) (int $storage.replicas) -}}
{{- $problems = append $problems (printf "chunks.replicas: %d copies need as many storage nodes, and storage.replicas is %d; raise it, or keep fewer copies" (int .Values.chunks.replicas) (int $storage.replicas)) -}}
{{- end -}}
{{- if and $disk.enabled (gt (include "kvstore.bytes" $disk.size | int64) (include "kvstore.bytes" $disk.volume.size | int64)) -}}
{{- $problems = append $problems (printf "storage.disk.size: %s do not fit on a volume of %s; raise storage.disk.volume.size" $disk.size $disk.volume.size) -}}
{{- end -}}
{{- if and (not $disk.enabled) (eq .Values.chunks.durability "durable") -}}
{{- $problems = append $problems "chunks.durability: durable needs storage.disk.enabled: true" -}}
{{- end -}}
{{- $limit := dig "limits" "memory" "" $storage.resources -}}
{{- if and $limit (lt (include "kvstore.bytes" $limit | int64) (include "kvstore.bytes" (include "kvstore.storageMemory" .) | int64)) -}}
{{- $problems = append $problems (printf "storage.resources.limits.memory: a node with storage.memory: %s needs %s or more; leave it out, and it is computed" $storage.memory (include "kvstore.storageMemory" .)) -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "kvstore.problems.redis" -}}
{{- $problems := list -}}
{{- $external := .Values.redis.external -}}
{{- if eq .Values.redis.mode "external" -}}
{{- if not $external.address -}}
{{- $problems = append $problems "redis.external.address: name the host:port of your Redis, or choose another redis.mode" -}}
{{- end -}}
{{- if gt (regexFind "[0-9]+$" $external.address | int) 65535 -}}
{{- $problems = append $problems (printf "redis.external.address: %s has no port between 1 and 65535" $external.address) -}}
{{- end -}}
{{- if not $external.existingSecret -}}
{{- $problems = append $problems "redis.external.existingSecret: name the Secret with the url of your Redis, or choose another redis.mode" -}}
{{- end -}}
{{- else if or $external.address $external.existingSecret -}}
{{- $problems = append $problems (printf "redis.external: is given, but redis.mode is %s; set redis.mode: external, or remove it" .Values.redis.mode) -}}
{{- end -}}
{{- if and (eq .Values.redis.mode "none") (not .Values.gateway.persistence.enabled) -}}
{{- $problems = append $problems "gateway.persistence.enabled: with redis.mode: none the catalogue is a file of the gateway, and would be lost with its pod; switch it on, or choose another redis.mode" -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{/* What users add may not meet what is there: Kubernetes refuses lists with two entries of one name. */}}
{{- define "kvstore.problems.additions" -}}
{{- $problems := list -}}
{{- $taken := dict "extraEnv" (list) "extraVolumes" (list "tmp" "shm" "storage" "serve" "tls" "credentials" "node" "encryption") -}}
{{- range include "kvstore.environment" . | fromYamlArray }}{{ $_ := set $taken "extraEnv" (append $taken.extraEnv .name) }}{{ end -}}
{{- $_ := set $taken "extraEnv" (concat $taken.extraEnv (list "KVSTORE_LISTEN" "KVSTORE_EVENTS" "KVSTORE_REDIS" "RAY_REDIS_ADDRESS" "RAY_REDIS_PASSWORD" "RAY_external_storage_namespace")) -}}
{{- range $list, $names := $taken -}}
{{- range index $.Values $list -}}
{{- if has .name $names -}}
{{- $problems = append $problems (printf "%s: the chart has a %s of its own, or it is given twice; choose another name" $list .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}
{{- $paths := list "/tmp" "/dev/shm" "/var/lib/kvstore" "/etc/kvstore/serve" "/etc/kvstore/tls" "/etc/kvstore/credentials" "/etc/kvstore/node" "/etc/kvstore/encryption" -}}
{{- $volumes := list -}}
{{- range .Values.extraVolumes }}{{ $volumes = append $volumes .name }}{{ end -}}
{{- range .Values.extraVolumeMounts -}}
{{- if not (has .name $volumes) -}}
{{- $problems = append $problems (printf "extraVolumeMounts: there is no volume %s; add it to extraVolumes" .name) -}}
{{- end -}}
{{- if has .mountPath $paths -}}
{{- $problems = append $problems (printf "extraVolumeMounts: something is mounted at %s already; choose another mountPath" .mountPath) -}}
{{- end -}}
{{- $paths = append $paths .mountPath -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}
