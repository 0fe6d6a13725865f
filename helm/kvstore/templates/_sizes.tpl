{{/* Bytes of a Kubernetes quantity, such as 4Gi, 1.5G or 500. */}}
{{- define "kvstore.bytes" -}}
{{- div (include "kvstore.thousandths" . | int64) 1000 -}}
{{- end -}}

{{/* Thousandths of a quantity, which is how finely Kubernetes counts processors. */}}
{{- define "kvstore.thousandths" -}}
{{- $text := toString . -}}
{{- $units := dict "m" 0.001 "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 -}}
{{- $unit := get $units (regexFind "[a-zA-Z]*$" $text) -}}
{{- mulf (regexFind "^[0-9.]+" $text | float64) $unit 1000.0 | int64 -}}
{{- end -}}

{{/* Memory that a storage node needs: its DRAM for chunks, and 1 GiB for Ray, Python and what is on its way. */}}
{{- define "kvstore.storageMemory" -}}
{{- add 1024 (div (include "kvstore.bytes" .Values.storage.memory | int64) 1048576) -}}Mi
{{- end -}}

{{- define "kvstore.storageResources" -}}
{{- $memory := include "kvstore.storageMemory" . -}}
{{- $computed := dict "requests" (dict "cpu" "1" "memory" $memory) "limits" (dict "memory" $memory) -}}
{{- mergeOverwrite $computed .Values.storage.resources | toYaml -}}
{{- end -}}
