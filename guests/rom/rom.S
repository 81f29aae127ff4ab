# A guest in 64 KiB of firmware: it beats on the serial port, writes to its memory at a set rate and finds corruption by
# itself. Up in 0.05 s, 16 MiB of memory are enough. For tests that need a guest but no operating system.
#
# What it says on COM1, a line each (numbers are eight hex digits):
#   start TOKEN                      once; seen twice, the guest was started twice
#   beat TOKEN COUNT PASS ERRORS     every `beat_ticks` ticks of 10 ms; COUNT rises by one and never falls
#   X ADDRESS                        this page is not what was written to it
#   D BLOCK                          this block of the disk is not what was written to it, or could not be read or written
#   off                              the power button was pressed; it powers itself off
#
# Where it has an RTL8139 at 00:08.0 (the first network interface), it also sends a broadcast frame of type 0x88b5 every
# `frame_ticks` ticks, for witnesses outside of the machine that runs it. Behind the Ethernet header: "beat", then TOKEN, COUNT,
# ERRORS and WRITES, four bytes each, least significant first; COUNT rises by one with each frame. The source address is the
# interface's own.
#
# Memory check: each tick visits `pages_per_tick` pages of [first, last). A visited page carries its own address mixed with a
# key and the number of the pass that wrote it, and must carry those of the pass before when it is visited again: a page that
# a migration lost, sent too early or put in the wrong place is noticed within one pass. With `noise` the first pass also fills
# the pages, so that each takes its 4 KiB on the way, compressed or not.
#
# Disk check: where it has a virtio disk at 00:10.0 (the first one) and `disk_blocks` is not 0, it visits that many blocks of 4 KiB,
# `disk_stride` blocks from one to the next, round after round. A visited block is read, must carry its own number and that of the
# round before, and is written with those of this round. Each tick takes one step, so nothing waits for the disk; WRITES counts
# the writes that were acknowledged. Writes are not flushed: what is acknowledged must survive a move, not a power cut.
#
# It also runs where KVM emulates every instruction: descriptors have their accessed bit set already (the table is in ROM),
# interrupts return by `lret $4` instead of `iret` (so they stay disabled, and the one `sti` is right before the `hlt`),
# and the local APIC is told to pass the old interrupt controller's line through.

        .equ COM1, 0x3f8
        .equ KEY, 0x5aa5c33c
        .equ PM, 0x600                  # where the ACPI registers are put
        .equ BUTTON, 0x100              # power button, in PM1 status and enable
        .equ STACK, 0x8000
        .equ ticks_left, 0x2000         # until the next beat
        .equ beats, 0x2004
        .equ pass, 0x2008
        .equ cursor, 0x200c
        .equ errors, 0x2010
        .equ frames_left, 0x2014        # ticks until the next frame
        .equ frames, 0x2018
        .equ sends, 0x201c              # whether there is something to send with
        .equ descriptor, 0x2020         # the next of its four
        .equ FRAME, 0x3000
        .equ FRAME_SIZE, 60             # Ethernet's least
        .equ NIC, 0xc000                # where its registers are put
        .equ disk_step, 0x2030          # 0 no disk, 1 a write has been asked for (or nothing), 2 a read
        .equ disk_cursor, 0x2034        # the block
        .equ disk_pass, 0x2038          # the round
        .equ requests, 0x203c           # so many requests so far
        .equ writes, 0x2040             # writes that were acknowledged
        .equ available, 0x2044          # where the queue's rings are
        .equ used, 0x2048
        .equ DISK, 0xd000               # where its registers are put
        .equ QUEUE, 0x10000             # virtio's queue; the first three descriptors are all it needs
        .equ QUEUE_ROOM, 0x10000        # enough for 1024 descriptors
        .equ BLOCK, 0x20000             # what is read or written
        .equ BLOCK_SIZE, 4096
        .equ HEADER, 0x21000            # of a request
        .equ STATUS, 0x21010

        .text
        .globl start
        .code16
start:
        cli
        mov     $2, %al                 # the A20 gate
        out     %al, $0x92
        lgdtl   %cs:(gdt_pointer - start)
        mov     %cr0, %eax
        and     $0x9fffffff, %eax       # caches on
        or      $1, %eax
        mov     %eax, %cr0
        ljmpl   $0x08, $protected

        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $STACK, %esp
        lidt    idt_pointer

        movl    $0x1ff, 0xfee000f0      # local APIC: on
        movl    $0x700, 0xfee00350      # LINT0: external interrupt

        mov     $0x11, %al              # interrupt controllers: vectors from 0x20, only the timer
        out     %al, $0x20
        out     %al, $0xa0
        mov     $0x20, %al
        out     %al, $0x21
        mov     $0x28, %al
        out     %al, $0xa1
        mov     $4, %al
        out     %al, $0x21
        mov     $2, %al
        out     %al, $0xa1
        mov     $1, %al
        out     %al, $0x21
        out     %al, $0xa1
        mov     $0xfe, %al
        out     %al, $0x21
        mov     $0xff, %al
        out     %al, $0xa1

        mov     $0x34, %al              # timer: 1193182 Hz / 11932 = 100 Hz
        out     %al, $0x43
        mov     $(11932 & 0xff), %al
        out     %al, $0x40
        mov     $(11932 >> 8), %al
        out     %al, $0x40

        call    power_setup
        call    nic_setup
        call    disk_setup

        mov     beat_ticks, %eax
        mov     %eax, ticks_left
        mov     first, %eax
        mov     %eax, cursor
        xor     %eax, %eax
        mov     %eax, beats
        mov     %eax, pass
        mov     %eax, errors
        mov     %eax, frames
        mov     %eax, descriptor

        mov     $say_start, %esi
        call    say
        mov     token, %eax
        call    say_number
        call    say_end

main:
        sti
        hlt
        call    visit
        call    disk
        call    beat
        call    send
        mov     $PM, %edx
        in      %dx, %ax
        test    $BUTTON, %eax
        jz      main
        mov     $say_off, %esi
        call    say
        mov     $(PM + 4), %edx         # sleep type 0 is S5 in QEMU's tables
        mov     $0x2000, %eax
        out     %ax, %dx
        cli
        hlt

# The power button only shows when ACPI is there and it is enabled.
power_setup:
        mov     $0x8000f800, %eax       # q35: ICH9, 00:1f.0
        call    pci_read
        cmp     $0x29188086, %eax
        jne     1f
        mov     $0x8000f840, %eax
        mov     $(PM | 1), %ecx
        call    pci_write
        mov     $0x8000f844, %eax
        mov     $0x80, %ecx
        call    pci_write
        jmp     2f
1:      mov     $0x80000b00, %eax       # pc: PIIX4 power management, 00:01.3
        call    pci_read
        cmp     $0x71138086, %eax
        jne     2f
        mov     $0x80000b40, %eax
        mov     $(PM | 1), %ecx
        call    pci_write
        mov     $0x80000b80, %eax
        mov     $1, %ecx
        call    pci_write
2:      mov     $(PM + 2), %edx
        mov     $BUTTON, %eax
        out     %ax, %dx
        ret

pci_read:
        mov     $0xcf8, %edx
        out     %eax, %dx
        mov     $0xcfc, %edx
        in      %dx, %eax
        ret

pci_write:
        mov     $0xcf8, %edx
        out     %eax, %dx
        mov     $0xcfc, %edx
        mov     %ecx, %eax
        out     %eax, %dx
        ret

tick:
        push    %eax
        mov     $0x20, %al
        out     %al, $0x20
        pop     %eax
        lret    $4
spurious:
        lret    $4

        .org 0x400                      # patched by the crate guest-rom, which knows these places
token:          .long 0
beat_ticks:     .long 10
pages_per_tick: .long 0
first:          .long 0x100000
last:           .long 0x200000
frame_ticks:    .long 0
disk_blocks:    .long 0
disk_stride:    .long 1
noise:          .long 0
        .org 0x440

visit:
        mov     pages_per_tick, %ecx
        test    %ecx, %ecx
        jz      9f
        mov     cursor, %edi
1:      mov     %edi, %eax
        xor     $KEY, %eax
        mov     pass, %edx
        test    %edx, %edx
        jz      3f                      # the first pass only fills
        cmp     %eax, (%edi)
        jne     2f
        dec     %edx
        cmp     %edx, 4(%edi)
        je      3f
2:      incl    errors
        push    %eax
        mov     $say_wrong, %esi
        call    say
        mov     %edi, %eax
        call    say_number
        call    say_end
        pop     %eax
3:      mov     %eax, (%edi)
        mov     pass, %edx
        mov     %edx, 4(%edi)
        test    %edx, %edx
        jnz     5f
        cmp     %edx, noise
        je      5f
        call    make_noise
5:      add     $0x1000, %edi
        cmp     last, %edi
        jb      4f
        mov     first, %edi
        incl    pass
4:      dec     %ecx
        jnz     1b
        mov     %edi, cursor
9:      ret

# Fills the rest of the page at %edi with what does not get smaller when it is compressed (Marsaglia's xorshift, from %eax).
make_noise:
        push    %ecx
        mov     $8, %edx
1:      mov     %eax, %ecx
        shl     $13, %ecx
        xor     %ecx, %eax
        mov     %eax, %ecx
        shr     $17, %ecx
        xor     %ecx, %eax
        mov     %eax, %ecx
        shl     $5, %ecx
        xor     %ecx, %eax
        mov     %eax, (%edi,%edx)
        add     $4, %edx
        cmp     $0x1000, %edx
        jb      1b
        pop     %ecx
        ret

beat:
        decl    ticks_left
        jnz     9f
        mov     beat_ticks, %eax
        mov     %eax, ticks_left
        incl    beats
        mov     $say_beat, %esi
        call    say
        mov     token, %eax
        call    say_number
        mov     $say_space, %esi
        call    say
        mov     beats, %eax
        call    say_number
        mov     $say_space, %esi
        call    say
        mov     pass, %eax
        call    say_number
        mov     $say_space, %esi
        call    say
        mov     errors, %eax
        call    say_number
        call    say_end
9:      ret

# Makes the network interface ready, and a frame that only lacks its numbers.
nic_setup:
        movl    $0, sends
        mov     frame_ticks, %eax
        mov     %eax, frames_left
        test    %eax, %eax
        jz      9f
        mov     $0x80004000, %eax       # 00:08.0
        call    pci_read
        cmp     $0x813910ec, %eax
        jne     9f
        mov     $0x80004010, %eax
        mov     $NIC, %ecx
        call    pci_write
        mov     $0x80004004, %eax       # answers on its ports, reads memory
        mov     $5, %ecx
        call    pci_write
        mov     $(NIC + 0x37), %edx     # command: reset, then transmitter on
        mov     $0x10, %al
        out     %al, %dx
        mov     $0x04, %al
        out     %al, %dx
        mov     $FRAME, %edi
        xor     %eax, %eax
        mov     $(FRAME_SIZE / 4), %ecx
        cld
        rep stosl
        movl    $0xffffffff, FRAME      # to everybody
        movw    $0xffff, FRAME + 4
        mov     $NIC, %edx              # its own address
        mov     $(FRAME + 6), %edi
        mov     $6, %ecx
1:      in      %dx, %al
        mov     %al, (%edi)
        inc     %edx
        inc     %edi
        dec     %ecx
        jnz     1b
        movw    $0xb588, FRAME + 12
        movl    $0x74616562, FRAME + 14 # "beat"
        mov     token, %eax
        mov     %eax, FRAME + 18
        movl    $1, sends
9:      ret

send:
        cmpl    $0, sends
        je      9f
        decl    frames_left
        jnz     9f
        mov     frame_ticks, %eax
        mov     %eax, frames_left
        incl    frames
        mov     frames, %eax
        mov     %eax, FRAME + 22
        mov     errors, %eax
        mov     %eax, FRAME + 26
        mov     writes, %eax
        mov     %eax, FRAME + 30
        mov     descriptor, %ecx
        lea     NIC + 0x20(, %ecx, 4), %edx
        mov     $FRAME, %eax
        out     %eax, %dx
        lea     NIC + 0x10(, %ecx, 4), %edx
        mov     $FRAME_SIZE, %eax
        out     %eax, %dx
        inc     %ecx
        and     $3, %ecx
        mov     %ecx, descriptor
9:      ret

# Makes the disk ready: a virtio device as virtio's specification has it under "legacy interface", with one queue.
disk_setup:
        xor     %eax, %eax
        mov     %eax, disk_step
        mov     %eax, disk_cursor
        mov     %eax, disk_pass
        mov     %eax, requests
        mov     %eax, writes
        cmpl    $0, disk_blocks
        je      9f
        mov     $0x80008000, %eax       # 00:10.0
        call    pci_read
        cmp     $0x10011af4, %eax
        jne     9f
        mov     $0x80008010, %eax
        mov     $DISK, %ecx
        call    pci_write
        mov     $0x80008004, %eax       # answers on its ports, reads and writes memory
        mov     $5, %ecx
        call    pci_write
        mov     $(DISK + 18), %edx      # status: reset, then acknowledged, and there is a driver
        xor     %eax, %eax
        out     %al, %dx
        mov     $3, %al
        out     %al, %dx
        mov     $(DISK + 4), %edx       # of its features only flushing: without it every write is forced to the disk
        mov     $(1 << 9), %eax
        out     %eax, %dx
        mov     $QUEUE, %edi
        xor     %eax, %eax
        mov     $(QUEUE_ROOM / 4), %ecx
        cld
        rep stosl
        mov     $(DISK + 14), %edx      # the queue's number
        out     %ax, %dx
        mov     $(DISK + 12), %edx      # its size
        in      %dx, %ax
        movzwl  %ax, %ecx
        mov     %ecx, %eax
        shl     $4, %eax
        add     $QUEUE, %eax
        mov     %eax, available
        movw    $1, (%eax)              # no interrupts
        lea     6 + 4095(%eax, %ecx, 2), %eax
        and     $~4095, %eax
        mov     %eax, used
        mov     $(DISK + 8), %edx
        mov     $(QUEUE >> 12), %eax
        out     %eax, %dx
        mov     $(DISK + 18), %edx      # the driver is ready
        mov     $7, %al
        out     %al, %dx
        movl    $HEADER, QUEUE
        movl    $16, QUEUE + 8
        movw    $1, QUEUE + 12          # goes on
        movw    $1, QUEUE + 14
        movl    $BLOCK, QUEUE + 16
        movl    $BLOCK_SIZE, QUEUE + 24
        movw    $2, QUEUE + 30
        movl    $STATUS, QUEUE + 32
        movl    $1, QUEUE + 40
        movw    $2, QUEUE + 44          # the device writes it
        movb    $0, STATUS
        movl    $1, disk_step
        decl    disk_cursor             # as if the block before the first had been written
        decl    writes
9:      ret

# One step of a visit, unless the disk still has the request.
disk:
        cmpl    $0, disk_step
        je      9f
        mov     used, %edi
        mov     2(%edi), %ax
        cmp     requests, %ax
        jne     9f
        cmpb    $0, STATUS
        je      1f
        call    disk_wrong
1:      mov     disk_cursor, %edx
        xor     $KEY, %edx
        mov     disk_pass, %ebx
        cmpl    $1, disk_step
        je      4f

        test    %ebx, %ebx              # it was read; the first round only writes
        jz      3f
        mov     $BLOCK, %edi
        mov     $(BLOCK_SIZE / 8), %ecx
        dec     %ebx
2:      cmp     %edx, (%edi)
        jne     5f
        cmp     %ebx, 4(%edi)
        jne     5f
        add     $8, %edi
        dec     %ecx
        jnz     2b
        jmp     3f
5:      call    disk_wrong
3:      mov     disk_pass, %ebx
        mov     $BLOCK, %edi
        mov     $(BLOCK_SIZE / 8), %ecx
6:      mov     %edx, (%edi)
        mov     %ebx, 4(%edi)
        add     $8, %edi
        dec     %ecx
        jnz     6b
        movl    $1, disk_step
        movw    $1, QUEUE + 28          # goes on; the device reads it
        mov     $1, %eax
        jmp     8f

4:      incl    writes                  # it was written
        mov     disk_cursor, %eax
        inc     %eax
        cmp     disk_blocks, %eax
        jb      7f
        xor     %eax, %eax
        incl    disk_pass
7:      mov     %eax, disk_cursor
        movl    $2, disk_step
        movw    $3, QUEUE + 28          # goes on; the device writes it
        xor     %eax, %eax

8:      mov     %eax, HEADER            # 0 read, 1 write
        movl    $0, HEADER + 4
        mov     disk_cursor, %eax
        imull   disk_stride, %eax
        shl     $3, %eax                # in sectors
        mov     %eax, HEADER + 8
        movl    $0, HEADER + 12
        movb    $0xff, STATUS
        incl    requests
        mov     requests, %eax
        mov     available, %edi         # every entry of the ring is 0, the first descriptor
        mov     %ax, 2(%edi)
        mov     $(DISK + 16), %edx
        xor     %eax, %eax
        out     %ax, %dx
9:      ret

disk_wrong:                             # leaves %edx, %ebx and %edi alone
        incl    errors
        mov     $say_disk, %esi
        call    say
        mov     disk_cursor, %eax
        call    say_number
        jmp     say_end

say:                                    # the text at %esi
        mov     (%esi), %al
        test    %al, %al
        jz      9f
        call    say_letter
        inc     %esi
        jmp     say
9:      ret

say_end:
        mov     $'\n', %al
say_letter:                             # %al; given up when the port does not take it, so that nothing can hang the guest
        push    %ecx
        push    %edx
        mov     %al, %ah
        mov     $100000, %ecx
        mov     $(COM1 + 5), %edx
1:      in      %dx, %al
        test    $0x20, %al
        jnz     2f
        dec     %ecx
        jnz     1b
2:      mov     $COM1, %edx
        mov     %ah, %al
        out     %al, %dx
        pop     %edx
        pop     %ecx
        ret

say_number:                             # %eax, eight hex digits
        push    %ecx
        push    %ebx
        mov     %eax, %ebx
        mov     $8, %ecx
1:      rol     $4, %ebx
        mov     %ebx, %eax
        and     $15, %eax
        cmp     $10, %eax
        jb      2f
        add     $('a' - '0' - 10), %eax
2:      add     $'0', %eax
        call    say_letter
        dec     %ecx
        jnz     1b
        pop     %ebx
        pop     %ecx
        ret

say_start:      .asciz "start "
say_beat:       .asciz "beat "
say_wrong:      .asciz "X "
say_disk:       .asciz "D "
say_off:        .asciz "off\n"
say_space:      .asciz " "

        .balign 16
gdt:    .quad 0
        .quad 0x00cf9b000000ffff        # flat code, accessed
        .quad 0x00cf93000000ffff        # flat data, accessed
gdt_pointer:
        .word 23
        .long gdt
        .balign 8
idt:    .fill 32, 8, 0
        .word tick - start, 0x08, 0x8e00, 0xffff
        .rept 15
        .word spurious - start, 0x08, 0x8e00, 0xffff
        .endr
idt_pointer:
        .word idt_pointer - idt - 1
        .long idt

        .org 0xfff0
        .code16
        jmp     start
        .org 0x10000
