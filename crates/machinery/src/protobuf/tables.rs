//! Which field is where: field numbers and JSON names of the messages that clients send in protobuf. They are facts of
//! Kubernetes' wire format (the `generated.proto` of each API group).
//!
//! One line a message: its name, then `name:type=number`. A name `-` is an inlined message (its members belong to the outer
//! object). Types: `string bool int bytes json quantity port time microtime skip`, or another message of the same group
//! or of `meta/v1`. `[]` before it: a list; `{}`: a map by string; `*`: a pointer in Go, so that its zero value (or
//! an empty message) was meant and is kept. `skip` is for statuses, which are the server's.

pub(super) const TABLES: &[(&str, &str)] = &[
    ("meta/v1", META),
    ("v1", CORE),
    ("policy/v1", POLICY),
    ("rbac.authorization.k8s.io/v1", RBAC),
    ("authentication.k8s.io/v1", AUTHENTICATION),
    ("authorization.k8s.io/v1", AUTHORIZATION),
    ("coordination.k8s.io/v1", COORDINATION),
    ("scheduling.k8s.io/v1", SCHEDULING),
    ("storage.k8s.io/v1", STORAGE),
    ("events.k8s.io/v1", EVENTS),
];

const META: &str = "
ObjectMeta name:string=1 generateName:string=2 namespace:string=3 selfLink:string=4 uid:string=5 resourceVersion:string=6 generation:int=7 creationTimestamp:time=8 deletionTimestamp:time=9 deletionGracePeriodSeconds:*int=10 labels:{}string=11 annotations:{}string=12 ownerReferences:[]OwnerReference=13 finalizers:[]string=14 managedFields:[]ManagedFieldsEntry=17
OwnerReference kind:string=1 name:string=3 uid:string=4 apiVersion:string=5 controller:*bool=6 blockOwnerDeletion:*bool=7
ManagedFieldsEntry manager:string=1 operation:string=2 apiVersion:string=3 time:time=4 fieldsType:string=6 fieldsV1:json=7 subresource:string=8
LabelSelector matchLabels:{}string=1 matchExpressions:[]LabelSelectorRequirement=2
LabelSelectorRequirement key:string=1 operator:string=2 values:[]string=3
DeleteOptions gracePeriodSeconds:*int=1 preconditions:*Preconditions=2 orphanDependents:*bool=3 propagationPolicy:*string=4 dryRun:[]string=5 ignoreStoreReadErrorWithClusterBreakingPotential:*bool=6
Preconditions uid:*string=1 resourceVersion:*string=2
";

const CORE: &str = "
Namespace metadata:ObjectMeta=1 spec:NamespaceSpec=2 status:skip=3
NamespaceSpec finalizers:[]string=1
ConfigMap metadata:ObjectMeta=1 data:{}string=2 binaryData:{}bytes=3 immutable:*bool=4
Secret metadata:ObjectMeta=1 data:{}bytes=2 type:string=3 stringData:{}string=4 immutable:*bool=5
ServiceAccount metadata:ObjectMeta=1 secrets:[]ObjectReference=2 imagePullSecrets:[]LocalObjectReference=3 automountServiceAccountToken:*bool=4
LocalObjectReference name:string=1
ObjectReference kind:string=1 namespace:string=2 name:string=3 uid:string=4 apiVersion:string=5 resourceVersion:string=6 fieldPath:string=7
ResourceQuota metadata:ObjectMeta=1 spec:ResourceQuotaSpec=2 status:skip=3
ResourceQuotaSpec hard:{}quantity=1 scopes:[]string=2 scopeSelector:*ScopeSelector=3
ScopeSelector matchExpressions:[]ScopedResourceSelectorRequirement=1
ScopedResourceSelectorRequirement scopeName:string=1 operator:string=2 values:[]string=3
Event metadata:ObjectMeta=1 involvedObject:ObjectReference=2 reason:string=3 message:string=4 source:EventSource=5 firstTimestamp:time=6 lastTimestamp:time=7 count:int=8 type:string=9 eventTime:microtime=10 series:*EventSeries=11 action:string=12 related:*ObjectReference=13 reportingComponent:string=14 reportingInstance:string=15
EventSeries count:int=1 lastObservedTime:microtime=2
EventSource component:string=1 host:string=2
Binding metadata:ObjectMeta=1 target:ObjectReference=2
Node metadata:ObjectMeta=1 spec:NodeSpec=2 status:skip=3
NodeSpec podCIDR:string=1 externalID:string=2 providerID:string=3 unschedulable:bool=4 taints:[]Taint=5 podCIDRs:[]string=7
Taint key:string=1 value:string=2 effect:string=3 timeAdded:time=4
PersistentVolumeClaim metadata:ObjectMeta=1 spec:PersistentVolumeClaimSpec=2 status:skip=3
PersistentVolumeClaimSpec accessModes:[]string=1 resources:VolumeResourceRequirements=2 volumeName:string=3 selector:*LabelSelector=4 storageClassName:*string=5 volumeMode:*string=6 dataSource:*TypedLocalObjectReference=7 dataSourceRef:*TypedObjectReference=8 volumeAttributesClassName:*string=9
VolumeResourceRequirements limits:{}quantity=1 requests:{}quantity=2
TypedLocalObjectReference apiGroup:*string=1 kind:string=2 name:string=3
TypedObjectReference apiGroup:*string=1 kind:string=2 name:string=3 namespace:*string=4
Service metadata:ObjectMeta=1 spec:ServiceSpec=2 status:skip=3
ServiceSpec ports:[]ServicePort=1 selector:{}string=2 clusterIP:string=3 type:string=4 externalIPs:[]string=5 sessionAffinity:string=7 loadBalancerIP:string=8 loadBalancerSourceRanges:[]string=9 externalName:string=10 externalTrafficPolicy:string=11 healthCheckNodePort:int=12 publishNotReadyAddresses:bool=13 ipFamilyPolicy:*string=17 clusterIPs:[]string=18 ipFamilies:[]string=19 allocateLoadBalancerNodePorts:*bool=20 loadBalancerClass:*string=21 internalTrafficPolicy:*string=22 trafficDistribution:*string=23
ServicePort name:string=1 protocol:string=2 port:int=3 targetPort:port=4 nodePort:int=5 appProtocol:*string=6
Pod metadata:ObjectMeta=1 spec:PodSpec=2 status:skip=3
PodSpec volumes:[]Volume=1 containers:[]Container=2 restartPolicy:string=3 terminationGracePeriodSeconds:*int=4 activeDeadlineSeconds:*int=5 dnsPolicy:string=6 nodeSelector:{}string=7 serviceAccountName:string=8 serviceAccount:string=9 nodeName:string=10 hostNetwork:bool=11 hostPID:bool=12 hostIPC:bool=13 securityContext:*PodSecurityContext=14 imagePullSecrets:[]LocalObjectReference=15 hostname:string=16 subdomain:string=17 affinity:*Affinity=18 schedulerName:string=19 initContainers:[]Container=20 automountServiceAccountToken:*bool=21 tolerations:[]Toleration=22 hostAliases:[]HostAlias=23 priorityClassName:string=24 priority:*int=25 dnsConfig:*PodDNSConfig=26 shareProcessNamespace:*bool=27 readinessGates:[]PodReadinessGate=28 runtimeClassName:*string=29 enableServiceLinks:*bool=30 preemptionPolicy:*string=31 overhead:{}quantity=32 topologySpreadConstraints:[]TopologySpreadConstraint=33 setHostnameAsFQDN:*bool=35 os:*PodOS=36 hostUsers:*bool=37 schedulingGates:[]PodSchedulingGate=38 resources:*ResourceRequirements=40 hostnameOverride:*string=41
Container name:string=1 image:string=2 command:[]string=3 args:[]string=4 workingDir:string=5 ports:[]ContainerPort=6 env:[]EnvVar=7 resources:ResourceRequirements=8 volumeMounts:[]VolumeMount=9 livenessProbe:*Probe=10 readinessProbe:*Probe=11 lifecycle:*Lifecycle=12 terminationMessagePath:string=13 imagePullPolicy:string=14 securityContext:*SecurityContext=15 stdin:bool=16 stdinOnce:bool=17 tty:bool=18 envFrom:[]EnvFromSource=19 terminationMessagePolicy:string=20 volumeDevices:[]VolumeDevice=21 startupProbe:*Probe=22 resizePolicy:[]ContainerResizePolicy=23 restartPolicy:*string=24
ContainerPort name:string=1 hostPort:int=2 containerPort:int=3 protocol:string=4 hostIP:string=5
ContainerResizePolicy resourceName:string=1 restartPolicy:string=2
EnvVar name:string=1 value:string=2 valueFrom:*EnvVarSource=3
EnvVarSource fieldRef:*ObjectFieldSelector=1 resourceFieldRef:*ResourceFieldSelector=2 configMapKeyRef:*KeySelector=3 secretKeyRef:*KeySelector=4
ObjectFieldSelector apiVersion:string=1 fieldPath:string=2
ResourceFieldSelector containerName:string=1 resource:string=2 divisor:quantity=3
KeySelector -:LocalObjectReference=1 key:string=2 optional:*bool=3
EnvFromSource prefix:string=1 configMapRef:*EnvSource=2 secretRef:*EnvSource=3
EnvSource -:LocalObjectReference=1 optional:*bool=2
ResourceRequirements limits:{}quantity=1 requests:{}quantity=2 claims:[]ResourceClaim=3
ResourceClaim name:string=1 request:string=2
VolumeMount name:string=1 readOnly:bool=2 mountPath:string=3 subPath:string=4 mountPropagation:*string=5 subPathExpr:string=6 recursiveReadOnly:*string=7
VolumeDevice name:string=1 devicePath:string=2
Probe -:Handler=1 initialDelaySeconds:int=2 timeoutSeconds:int=3 periodSeconds:int=4 successThreshold:int=5 failureThreshold:int=6 terminationGracePeriodSeconds:*int=7
Handler exec:*ExecAction=1 httpGet:*HTTPGetAction=2 tcpSocket:*TCPSocketAction=3 grpc:*GRPCAction=4
LifecycleHandler exec:*ExecAction=1 httpGet:*HTTPGetAction=2 tcpSocket:*TCPSocketAction=3 sleep:*SleepAction=4
Lifecycle postStart:*LifecycleHandler=1 preStop:*LifecycleHandler=2 stopSignal:*string=3
ExecAction command:[]string=1
HTTPGetAction path:string=1 port:*port=2 host:string=3 scheme:string=4 httpHeaders:[]HTTPHeader=5
HTTPHeader name:string=1 value:string=2
TCPSocketAction port:*port=1 host:string=2
GRPCAction port:int=1 service:*string=2
SleepAction seconds:*int=1
SecurityContext capabilities:*Capabilities=1 privileged:*bool=2 seLinuxOptions:*SELinuxOptions=3 runAsUser:*int=4 runAsNonRoot:*bool=5 readOnlyRootFilesystem:*bool=6 allowPrivilegeEscalation:*bool=7 runAsGroup:*int=8 procMount:*string=9 seccompProfile:*SeccompProfile=11 appArmorProfile:*SeccompProfile=12
PodSecurityContext seLinuxOptions:*SELinuxOptions=1 runAsUser:*int=2 runAsNonRoot:*bool=3 supplementalGroups:[]int=4 fsGroup:*int=5 runAsGroup:*int=6 sysctls:[]HTTPHeader=7 fsGroupChangePolicy:*string=9 seccompProfile:*SeccompProfile=10 appArmorProfile:*SeccompProfile=11 supplementalGroupsPolicy:*string=12 seLinuxChangePolicy:*string=13
Capabilities add:[]string=1 drop:[]string=2
SELinuxOptions user:string=1 role:string=2 type:string=3 level:string=4
SeccompProfile type:string=1 localhostProfile:*string=2
Toleration key:string=1 operator:string=2 value:string=3 effect:string=4 tolerationSeconds:*int=5
HostAlias ip:string=1 hostnames:[]string=2
PodDNSConfig nameservers:[]string=1 searches:[]string=2 options:[]PodDNSConfigOption=3
PodDNSConfigOption name:string=1 value:*string=2
PodReadinessGate conditionType:string=1
PodSchedulingGate name:string=1
PodOS name:string=1
TopologySpreadConstraint maxSkew:int=1 topologyKey:string=2 whenUnsatisfiable:string=3 labelSelector:*LabelSelector=4 minDomains:*int=5 nodeAffinityPolicy:*string=6 nodeTaintsPolicy:*string=7 matchLabelKeys:[]string=8
Affinity nodeAffinity:*NodeAffinity=1 podAffinity:*PodAffinity=2 podAntiAffinity:*PodAffinity=3
NodeAffinity requiredDuringSchedulingIgnoredDuringExecution:*NodeSelector=1 preferredDuringSchedulingIgnoredDuringExecution:[]PreferredSchedulingTerm=2
NodeSelector nodeSelectorTerms:[]NodeSelectorTerm=1
NodeSelectorTerm matchExpressions:[]LabelSelectorRequirement=1 matchFields:[]LabelSelectorRequirement=2
PreferredSchedulingTerm weight:int=1 preference:*NodeSelectorTerm=2
PodAffinity requiredDuringSchedulingIgnoredDuringExecution:[]PodAffinityTerm=1 preferredDuringSchedulingIgnoredDuringExecution:[]WeightedPodAffinityTerm=2
PodAffinityTerm labelSelector:*LabelSelector=1 namespaces:[]string=2 topologyKey:string=3 namespaceSelector:*LabelSelector=4 matchLabelKeys:[]string=5 mismatchLabelKeys:[]string=6
WeightedPodAffinityTerm weight:int=1 podAffinityTerm:*PodAffinityTerm=2
Volume name:string=1 -:VolumeSource=2
VolumeSource hostPath:*HostPathVolumeSource=1 emptyDir:*EmptyDirVolumeSource=2 secret:*SecretVolumeSource=6 nfs:*NFSVolumeSource=7 persistentVolumeClaim:*PersistentVolumeClaimVolumeSource=10 downwardAPI:*DownwardAPIVolumeSource=16 configMap:*ConfigMapVolumeSource=19 projected:*ProjectedVolumeSource=26 image:*ImageVolumeSource=30
HostPathVolumeSource path:string=1 type:*string=2
EmptyDirVolumeSource medium:string=1 sizeLimit:*quantity=2
NFSVolumeSource server:string=1 path:string=2 readOnly:bool=3
SecretVolumeSource secretName:string=1 items:[]KeyToPath=2 defaultMode:*int=3 optional:*bool=4
ConfigMapVolumeSource -:LocalObjectReference=1 items:[]KeyToPath=2 defaultMode:*int=3 optional:*bool=4
KeyToPath key:string=1 path:string=2 mode:*int=3
PersistentVolumeClaimVolumeSource claimName:string=1 readOnly:bool=2
DownwardAPIVolumeSource items:[]DownwardAPIVolumeFile=1 defaultMode:*int=2
DownwardAPIVolumeFile path:string=1 fieldRef:*ObjectFieldSelector=2 resourceFieldRef:*ResourceFieldSelector=3 mode:*int=4
ProjectedVolumeSource sources:[]VolumeProjection=1 defaultMode:*int=2
VolumeProjection secret:*Projection=1 downwardAPI:*DownwardAPIVolumeSource=2 configMap:*Projection=3 serviceAccountToken:*ServiceAccountTokenProjection=4
Projection -:LocalObjectReference=1 items:[]KeyToPath=2 optional:*bool=4
ServiceAccountTokenProjection audience:string=1 expirationSeconds:*int=2 path:string=3
ImageVolumeSource reference:string=1 pullPolicy:string=2
";

const POLICY: &str = "
PodDisruptionBudget metadata:ObjectMeta=1 spec:PodDisruptionBudgetSpec=2 status:skip=3
PodDisruptionBudgetSpec minAvailable:*port=1 selector:*LabelSelector=2 maxUnavailable:*port=3 unhealthyPodEvictionPolicy:*string=4
Eviction metadata:ObjectMeta=1 deleteOptions:*DeleteOptions=2
";

const RBAC: &str = "
Role metadata:ObjectMeta=1 rules:[]PolicyRule=2
ClusterRole metadata:ObjectMeta=1 rules:[]PolicyRule=2 aggregationRule:*AggregationRule=3
AggregationRule clusterRoleSelectors:[]LabelSelector=1
PolicyRule verbs:[]string=1 apiGroups:[]string=2 resources:[]string=3 resourceNames:[]string=4 nonResourceURLs:[]string=5
RoleBinding metadata:ObjectMeta=1 subjects:[]Subject=2 roleRef:RoleRef=3
ClusterRoleBinding metadata:ObjectMeta=1 subjects:[]Subject=2 roleRef:RoleRef=3
RoleRef apiGroup:string=1 kind:string=2 name:string=3
Subject kind:string=1 apiGroup:string=2 name:string=3 namespace:string=4
";

const AUTHENTICATION: &str = "
TokenRequest metadata:ObjectMeta=1 spec:TokenRequestSpec=2 status:skip=3
TokenRequestSpec audiences:[]string=1 boundObjectRef:*BoundObjectReference=3 expirationSeconds:*int=4
BoundObjectReference kind:string=1 apiVersion:string=2 name:string=3 uid:string=4
TokenReview metadata:ObjectMeta=1 spec:TokenReviewSpec=2 status:skip=3
TokenReviewSpec token:string=1 audiences:[]string=2
SelfSubjectReview metadata:ObjectMeta=1 status:skip=2
";

const AUTHORIZATION: &str = "
SelfSubjectAccessReview metadata:ObjectMeta=1 spec:SelfSubjectAccessReviewSpec=2 status:skip=3
SelfSubjectAccessReviewSpec resourceAttributes:*ResourceAttributes=1 nonResourceAttributes:*NonResourceAttributes=2
SubjectAccessReview metadata:ObjectMeta=1 spec:SubjectAccessReviewSpec=2 status:skip=3
LocalSubjectAccessReview metadata:ObjectMeta=1 spec:SubjectAccessReviewSpec=2 status:skip=3
SubjectAccessReviewSpec resourceAttributes:*ResourceAttributes=1 nonResourceAttributes:*NonResourceAttributes=2 user:string=3 groups:[]string=4 extra:{}ExtraValue=5 uid:string=6
ExtraValue .:[]string=1
SelfSubjectRulesReview metadata:ObjectMeta=1 spec:SelfSubjectRulesReviewSpec=2 status:skip=3
SelfSubjectRulesReviewSpec namespace:string=1
ResourceAttributes namespace:string=1 verb:string=2 group:string=3 version:string=4 resource:string=5 subresource:string=6 name:string=7 fieldSelector:*SelectorAttributes=8 labelSelector:*SelectorAttributes=9
SelectorAttributes rawSelector:string=1 requirements:[]LabelSelectorRequirement=2
NonResourceAttributes path:string=1 verb:string=2
";

const COORDINATION: &str = "
Lease metadata:ObjectMeta=1 spec:LeaseSpec=2
LeaseSpec holderIdentity:*string=1 leaseDurationSeconds:*int=2 acquireTime:microtime=3 renewTime:microtime=4 leaseTransitions:*int=5 strategy:*string=6 preferredHolder:*string=7
";

const SCHEDULING: &str = "
PriorityClass metadata:ObjectMeta=1 value:*int=2 globalDefault:bool=3 description:string=4 preemptionPolicy:*string=5
";

const STORAGE: &str = "
StorageClass metadata:ObjectMeta=1 provisioner:string=2 parameters:{}string=3 reclaimPolicy:*string=4 mountOptions:[]string=5 allowVolumeExpansion:*bool=6 volumeBindingMode:*string=7 allowedTopologies:[]TopologySelectorTerm=8
TopologySelectorTerm matchLabelExpressions:[]TopologySelectorLabelRequirement=1
TopologySelectorLabelRequirement key:string=1 values:[]string=2
";

const EVENTS: &str = "
Event metadata:ObjectMeta=1 eventTime:microtime=2 series:*EventSeries=3 reportingController:string=4 reportingInstance:string=5 action:string=6 reason:string=7 regarding:ObjectReference=8 related:*ObjectReference=9 note:string=10 type:string=11 deprecatedSource:EventSource=12 deprecatedFirstTimestamp:time=13 deprecatedLastTimestamp:time=14 deprecatedCount:int=15
EventSeries count:int=1 lastObservedTime:microtime=2
EventSource component:string=1 host:string=2
ObjectReference kind:string=1 namespace:string=2 name:string=3 uid:string=4 apiVersion:string=5 resourceVersion:string=6 fieldPath:string=7
";
